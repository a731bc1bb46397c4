"""The installed programs as processes: what a person types, and what power cuts do."""
