"""A job on this machine or on several: each is tried, torchrun is started, its output shown.

In the order of reading: ``hosts`` (who takes part), ``place`` (how a program is started there),
``probe`` and ``preflight`` (whether it can take part), ``job`` (what torchrun is told), ``keeper``
and ``agent`` (what runs on each host), ``logs`` and ``supervise`` (what goes on here meanwhile).
"""
