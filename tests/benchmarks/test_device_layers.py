"""The constants that the report prints for the decoder are those that its seconds were made of."""

import pytest
import torch

from spark_fast.decoder.gpu_costs import DECODER_RATES, merging_costs, projection_costs


def test_decoder_rates_are_found_again_from_what_layers_take_by_them():
    from device_jobs import NotHereError
    from device_layers import Comparison, _rates

    truth = DECODER_RATES._replace(memory=2.9e12, rows=1.1e12, products=450e12, launch=5e-6)
    cases = [(merging_costs, (256, 7 << i, 7 << i, 768 >> i)) for i in range(5)]
    cases += [(projection_costs, (256 * 49 * 4**i, 0.4, 2048 >> i, 768 >> i)) for i in range(1, 4)]
    found = []
    for model, arguments in cases:
        rest = 1.5 if model is merging_costs else 0.0  # milliseconds of the block's other layers
        costs = model(*arguments, truth)
        found.append(Comparison(model, arguments, {f"{k} ms": 1000 * v + rest for k, v in costs.items()}))
    text = _rates(found, torch.device("cuda"))["rates"]
    printed = eval(text, {"DecoderRates": type(DECODER_RATES)})
    for name in ("rows", "products"):
        assert getattr(printed, name) == pytest.approx(getattr(truth, name), rel=0.15), text
    with pytest.raises(NotHereError, match="takes a GPU"):
        _rates(found, torch.device("cpu"))
    with pytest.raises(NotHereError, match="no layer of the decoder was measured"):
        _rates([], torch.device("cuda"))
