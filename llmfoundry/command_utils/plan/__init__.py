"""``llmfoundry plan``: memory of a training run, from its YAML alone.

``command`` is the way in. ``fake_model`` builds and shards the model on fake tensors, ``simulate`` runs a step of it, ``storage_log`` records its allocations, ``arithmetic`` makes bytes of them,
``estimate`` adds what a simulation cannot see, ``alternatives`` tries changes, ``report`` prints.
"""
