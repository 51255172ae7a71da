"""The data: any array in, row-aligned lazy blocks out; and the sampling of rows from them."""
