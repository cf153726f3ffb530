"""A trained net at work: a budget at run time decides its depth."""
