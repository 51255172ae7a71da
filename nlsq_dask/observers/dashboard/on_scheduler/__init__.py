"""What runs in the scheduler's process, which may lack this package.

It is sent there as code (see ``shipping.py``), so its modules import the standard library, each
other, distributed, and Bokeh and prometheus_client in the functions that need them; no more. Their
classes are plain ones: dataclasses do not survive the journey whole.
"""
