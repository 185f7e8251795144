"""ReFT adapters in unforked vLLM: any number of them in one batch, behind its OpenAI API.

    adapter directory --Store--> immutable version (by content)         the front end's process
    request + version --Edits--> SamplingParams.extra_args["reftune"]   travels with the request
    Edits --block_key--> the prefix cache's keys                        the engine's process
    Edits of a step --Plan--> one batched product per layer             the workers' processes

`plugin.install` is vLLM's entry point; it hangs these into vLLM and is the only place that does.
Nothing acts until an engine is made with `additional_config={"reftune": {}}`.
"""
