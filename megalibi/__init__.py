"""megalibi: distributed pretraining of ALiBi GPTs.

The reading order is the life of a training step: config, launch, data, model, engine, checkpoint, report.
"""

__version__ = "0.1.0"
