"""The update machine: from a signed release repository to a model that proved itself here."""
