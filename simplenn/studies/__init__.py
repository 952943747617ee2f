"""The eight studies, one module each. A module has PARTS, {name of a part: function of a tools.Context}."""
