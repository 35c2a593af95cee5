"""One frozen model per stage: YAML file first, then dotted overrides, later wins."""
