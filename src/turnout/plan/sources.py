"""Where the sizes of named models are from."""

from turnout.errors import ConfigError

_HUB = "config.json of "
SOURCES = {
    "tiny": "turnout.models.presets",
    "tiny-dense": "turnout.models.presets",
    "smoke": "turnout.models.presets",
    "mixtral-8x7b": f"{_HUB}mistralai/Mixtral-8x7B-v0.1; arXiv:2401.04088",
    "mixtral-8x22b": f"{_HUB}mistralai/Mixtral-8x22B-v0.1",
    "deepseek-v3": f"{_HUB}deepseek-ai/DeepSeek-V3; arXiv:2412.19437",
    "deepseek-v2": "arXiv:2405.04434, section 3.1.2",
    "qwen3-30b-a3b": f"{_HUB}Qwen/Qwen3-30B-A3B; arXiv:2505.09388",
    "olmoe-1b-7b": f"{_HUB}allenai/OLMoE-1B-7B-0924; arXiv:2409.02060",
    "gpt-oss-120b": f"{_HUB}openai/gpt-oss-120b",
    "gpt-oss-20b": f"{_HUB}openai/gpt-oss-20b",
    "deepspeed-350m-moe-128": "arXiv:2201.05596, table 1 (350M+MoE-128)",
    "llama2-7b": f"{_HUB}meta-llama/Llama-2-7b-hf",
    "llama2-13b": f"{_HUB}meta-llama/Llama-2-13b-hf",
    "llama2-70b": f"{_HUB}meta-llama/Llama-2-70b-hf",
    "llama3-8b": f"{_HUB}meta-llama/Meta-Llama-3-8B",
    "llama3-70b": f"{_HUB}meta-llama/Meta-Llama-3-70B",
    "llama3.1-405b": f"{_HUB}meta-llama/Llama-3.1-405B",
    "gpt3-5b": "NeMo, docs/performance_summary",
    "gpt3-20b": "NeMo, docs/performance_summary",
    "gpt3-175b": "arXiv:2104.04473, table 1",
    "megascale-175b": "arXiv:2402.15627, section 6",
    "mtnlg-530b": "arXiv:2201.11990",
    "nemotron-8b": "NeMo, docs/performance_summary",
    "nemotron-22b": "NeMo, docs/performance_summary",
    "nemotron4-340b": "arXiv:2406.11704",
    "mixtral-8x22b-g8t8": "arXiv:2504.14960, section 4.1",
    "llama3-8x70b": "arXiv:2504.14960, section 4.1",
    "qwen2-57b-a14b": f"{_HUB}Qwen/Qwen2-57B-A14B",
    "palm-540b": "arXiv:2204.02311, table 1",
    "skywork-moe-146b": "arXiv:2406.06563, table 1",
    "gshard-600b": "arXiv:2006.16668, table 1",
    "gpt4-moe": "SemiAnalysis 2023: a leak, every number a rumour",
    "gpt4-dense": "gpt4-moe with one expert that every token meets",
}


def source_of(model: str) -> str:
    """Where the sizes of the built-in model of that name are from.

    Raises: ConfigError if nothing says so.
    """
    if model not in SOURCES:
        raise ConfigError(f"model {model!r} has no source; add one beside its shape")
    return SOURCES[model]
