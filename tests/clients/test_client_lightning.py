"""lightning trains a gemmakit model, saves a checkpoint and goes on from it."""

import lightning
import torch
from torch.utils.data import DataLoader

import gemmakit


class Tuned(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def trainer(folder, steps):
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip


def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    # Where in an epoch it goes on is lightning's: every row is the same.
    rows = torch.randint(4, 2000, (1, 12), generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    made = []
    for stops in ((4,), (2, 4)):
        tuned, saved = Tuned(gemmakit.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)), None
        for steps in stops:
            run = trainer(tmp_path, steps)
            run.fit(tuned, DataLoader(rows, batch_size=1), ckpt_path=saved)
            saved = tmp_path / f"{steps}.ckpt"
            run.save_checkpoint(saved)
        made.append(tuned.model)
    assert made[0].lm_head.weight is made[0].model.embed_tokens.weight
    for one, other in zip(made[0].state_dict().values(), made[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
