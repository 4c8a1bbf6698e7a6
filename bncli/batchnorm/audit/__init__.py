"""What is wrong with running statistics, judged from their numbers.

`rules.py` has one function per rule: to add one, write it there. `definition.py` says what a rule is made of,
`channels.py` and `initial.py` compute what several rules need, `audit.py` runs them all.
"""
