"""The formats two programs must agree on, with their readers and writers.

Imports nothing of ours from outside this package; msgspec is its only dependency, so that a tool
that only reads manifests needs neither numpy nor onnxruntime.

| module | format |
|---|---|
| ``digest``, ``version`` | the two values everything is named by |
| ``manifest``, ``bundle`` | what a model is: ``manifest.json`` and its content-addressed members |
| ``golden``, ``baseline`` | two of those members: self-test vectors and the drift reference |
| ``repository`` | the release repository: where TUF metadata, targets and blobs lie |
| ``assignments`` | the signed document that says what runs where |
| ``metric_names`` | names, units and labels of every metric |
"""
