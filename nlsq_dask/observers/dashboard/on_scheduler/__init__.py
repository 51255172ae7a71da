"""Code that runs in the process of the Dask scheduler, which may lack this package.

``shipping.py`` sends the code itself, so modules of this folder import only the standard library,
distributed and each other. Bokeh and prometheus_client, which are optional, are imported within
functions. The modules define no dataclasses, which are not reliably sent with their code.
"""
