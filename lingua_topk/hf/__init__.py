"""Export to Hugging Face and what transformers needs to load it.

Importing this room imports transformers; `import lingua_topk` does not.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lingua_topk.hf.modeling_topk_lm import TopKLMConfig, TopKLMForCausalLM, TopKLMModel


def register() -> None:
    """Make transformers' Auto classes know TopK models, without remote code.

    Afterwards `AutoModelForCausalLM.from_pretrained(FOLDER)` loads an exported folder with the
    classes of this package. Called again it changes nothing.
    """
    AutoConfig.register(TopKLMConfig.model_type, TopKLMConfig, exist_ok=True)
    AutoModel.register(TopKLMConfig, TopKLMModel, exist_ok=True)
    AutoModelForCausalLM.register(TopKLMConfig, TopKLMForCausalLM, exist_ok=True)


__all__ = ["TopKLMConfig", "TopKLMForCausalLM", "TopKLMModel", "register"]
