"""How steering is measured. Without torch, so that what reads flags starts at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How steering is measured; all of it stands in the results.

    Attributes:
        n: concepts.
        candidates: neurons of lowest semantic entropy whose output score is measured.
        deltas: in multiples of a neuron's maximum, or of a direction's length.
        prompts: of the reported numbers; half as many are to choose by.
        prompt_tokens, max_tokens: of a prompt, and of what is generated.
        temperature: of the draws.
        seed: of the draws, of the prompts and of the random neurons.
    """

    n: int = 10
    candidates: int = 128
    deltas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    prompts: int = 32
    prompt_tokens: int = 12
    max_tokens: int = 40
    temperature: float = 0.8
    seed: int = 0
