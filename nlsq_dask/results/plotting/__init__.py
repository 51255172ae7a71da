"""Pictures of a result, by matplotlib, which is imported where something is drawn."""
