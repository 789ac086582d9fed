"""LAION's aesthetic predictor: how much people like an image, whatever it is of, from 1 to 10.

A linear head on the embedding of CLIP ViT-L/14, of length 1, as in `simple_inference.py` of
christophschuhmann/improved-aesthetic-predictor. Its layers have no activations between them.
"""

from torch import Tensor

from vp_rl.configuration.kinds import Dtype, Text
from vp_rl.interfaces import Reward
from vp_rl.rewards import checkpoints
from vp_rl.rewards.clip_towers import Towers, read_colours
from vp_rl.rewards.head import Head
from vp_rl.rewards.preprocess import Colours, preprocess
from vp_rl.types import Images, Scores

_WIDTHS = (1024, 128, 64, 16)


class AestheticReward(Reward):
    """The aesthetic score; prompts are ignored. Frozen, and always in evaluation mode.

    Args:
        clip: its text tower is not needed, and removed.
        head: on its image embedding.
        colours: what pixels are standardised by.
    """

    differentiable = True

    def __init__(self, clip: Towers, head: Head, colours: Colours) -> None:
        super().__init__()
        del clip.text, clip.text_projection
        self.clip, self.head, self.colours = clip, head.requires_grad_(False), colours
        self.eval()

    @classmethod
    def load(
        cls,
        head: Text,
        *,
        file: Text = "sac+logos+ava1-l14-linearMSE.pth",
        revision: Text | None = None,
        clip: Text = "openai/clip-vit-large-patch14",
        dtype: Dtype = "float32",
    ) -> "AestheticReward":
        """Reads the head and the CLIP model that it was trained on.

        Args:
            head: a file, a folder, or a hub name.
            file: its name in that folder or repository.
            revision: of the repository.
            clip: a folder or hub name of a CLIP model in transformers' format.
            dtype: of the vision tower: float32, float16 or bfloat16. The head stays in float32.

        Raises:
            FileNotFoundError: there is no such head or model.
            ValueError: one of them is damaged, or they do not fit each other.
        """
        towers = Towers.load(clip, "reward.clip", dtype)
        colours = read_colours(clip, "reward.clip", towers.size)
        state = checkpoints.read(head, file, revision, "reward.head", "state_dict")
        fitted = _fitted(state, towers.width, f"reward.head={head!r} does not fit reward.clip={clip!r}")
        return cls(towers, fitted, colours)

    def train(self, mode: bool = True) -> "AestheticReward":
        """Nothing: the head's dropout would make scores random."""
        return super().train(False)

    def forward(self, images: Images, prompts: list[str]) -> Scores:
        """Scores in float32, most of them between 1 and 10; gradients flow to the images."""
        return self.head.combine(self.head(self.clip.look(preprocess(images, self.clip.size, self.colours))))


def _fitted(state: dict[str, Tensor], width: int, wrong: str) -> Head:
    head = Head(width, _WIDTHS)
    state = {**dict(head.named_buffers()), **state}  # mean 0 and std 1: scores are as published
    own = {name: tensor.shape for name, tensor in head.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    unfit = sorted(name for name in own | given if own.get(name) != given.get(name))
    if unfit:
        raise ValueError(f"{wrong}: tensors are missing, left over or of another shape: {', '.join(unfit)}.")
    head.load_state_dict(state)
    return head
