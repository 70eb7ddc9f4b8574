"""Single measurements, each made in a process of its own: a turn of steps, a step's profile, a device's ceilings.

Studies start such processes and collect what they write.
"""
