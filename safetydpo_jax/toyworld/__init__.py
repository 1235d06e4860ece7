"""The embedded default: a small world in which a safety method can be counted.

Coloured shapes on backgrounds play harmless images, 42 abstract symbols with invented
names play seven categories of harm. It is a model of the method; nothing measured
here is evidence about real harmful content.
"""
