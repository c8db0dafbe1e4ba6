"""ONNX of a gemmakit model gives its logits in onnxruntime, for other shapes than it was made with too."""

import onnxruntime
import pytest
import torch


@pytest.mark.parametrize("padded", [False, True])
def test_onnxruntime_agrees(model, ids, padded, tmp_path):
    mask = torch.ones_like(ids)
    rows, width = torch.export.Dim("rows", min=1, max=8), torch.export.Dim("width", min=2, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            (torch.cat((ids, ids)), torch.cat((mask, mask))) if padded else (torch.cat((ids, ids)),),
            kwargs={"use_cache": False},
            dynamo=True,
            dynamic_shapes={"input_ids": {0: rows, 1: width}, "use_cache": None}
            | ({"attention_mask": {0: rows, 1: width}} if padded else {}),
        )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    other = torch.randint(4, model.config.vocab_size, (3, 9))
    given = {"input_ids": other.numpy()}
    seen = torch.ones_like(other)
    if padded:
        seen[1, :4] = 0
        given["attention_mask"] = seen.numpy()
    with torch.no_grad():
        expected = model(other, seen if padded else None, use_cache=False).logits
    (logits,) = session.run(None, given)
    torch.testing.assert_close(torch.from_numpy(logits)[seen.bool()], expected[seen.bool()], atol=1e-3, rtol=1e-3)
