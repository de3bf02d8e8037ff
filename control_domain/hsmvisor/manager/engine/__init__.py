"""What makes it so: lines are looked at one by one, all that there is about one is gathered, and the next step is taken.

Each step is stored before the next one is thought of, and can be taken again: a manager that dies at any point leaves a line that
another one looks at.
"""
