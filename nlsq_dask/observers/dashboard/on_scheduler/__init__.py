"""Code that runs on the scheduler, which may lack this package.

It is sent by value (see ``shipping.py``). Its modules import only the standard library, each other
and distributed, and Bokeh and prometheus_client within functions. Dataclasses cannot be sent.
"""
