"""A model from a checkpoint of any origin: a run folder, a file of ours, a published one, or an encoder alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from spark_fast.errors import CheckpointError, SettingsError
from spark_fast.method import Method
from spark_fast.networks import PUBLISHED_MODELS, parse_input_size
from spark_fast.weights.load import load_into_spark
from spark_fast.weights.model_spec import ModelSpec
from spark_fast.weights.read import Weights, read_weights


@dataclass(frozen=True)
class Pretrained:
    """A model with pre-trained weights, and what is known of them.

    Attributes:
        weights: as they were read.
        spec: what the model is; of a published file only the network, the input and the decoder's width are known.
        model: on the host, fp32, in evaluation mode. Its decoder is a new one where the weights have none.
    """

    weights: Weights
    spec: ModelSpec
    model: Method

    @property
    def path(self) -> Path:
        """The file that was read."""
        return self.weights.path


def load_pretrained(source: Path, network: str = "", input_size: str = "") -> Pretrained:
    """Read a checkpoint and build the model it is of.

    Args:
        source: a run folder (its newest checkpoint that is whole), or a .pth or .safetensors file.
        network: as --model of training, where the file does not tell. Your own network, `package.module:function`,
            must be named here: code is imported because you say so, never because a file does.
        input_size: "N" or "HxW" pixels instead of the checkpoint's (or of 224, where it has none).

    Raises:
        CheckpointError: there is none, it cannot be read, its network is unknown, or it does not fit.
        SettingsError: a network or an input size that cannot be used.
    """
    weights = read_weights(source)
    spec = _spec(weights, PUBLISHED_MODELS.get(network, network))
    if input_size:
        spec = replace(spec, input_size=parse_input_size(input_size))
    try:
        model = spec.build()
    except ValueError as error:
        raise SettingsError(f"{weights.path}: {error}") from error
    load_into_spark(weights, model)
    return Pretrained(weights, spec, model.eval())


def _spec(weights: Weights, asked: str) -> ModelSpec:
    if weights.settings:
        try:
            spec = ModelSpec.from_settings(weights.settings)
        except (TypeError, ValueError, SettingsError) as error:
            raise CheckpointError(f"{weights.path} has settings that this version cannot read ({error})") from None
        if known := weights.statistics:
            spec = replace(spec, mean=known.mean, std=known.std)
        return replace(spec, network=weights.choose_network(asked) or spec.network)
    network = weights.choose_network(asked)
    if not network:
        raise CheckpointError(weights.unknown())
    return ModelSpec.from_weights(weights, network)
