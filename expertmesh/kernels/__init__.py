"""Operations with several implementations: one folder each, ``reference.py`` is the definition."""
