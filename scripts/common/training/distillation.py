"""The loss of a classifier that may also learn from a larger one's logits."""

from __future__ import annotations

from collections.abc import Callable


def make_loss(
    weights=None, label_smoothing: float = 0.0, teacher_share: float = 0.5, temperature: float = 2.0
) -> Callable:
    """loss(outputs, labels) for transformers' Trainer(compute_loss_func=...).

    labels: float [rows, 1], the class; or [rows, 1 + classes], the class and the teacher's logits behind it. With a teacher the loss is
    (1 - teacher_share) * cross-entropy + teacher_share * temperature ** 2 * KL(teacher || student), both softened by the temperature
    (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). weights: of the classes in the cross-entropy, a tensor or None.
    """
    import torch.nn.functional as F

    def loss(
        outputs, labels, num_items_in_batch=None
    ):  # the last is for accumulated steps: a classifier's stage has none
        logits = outputs.logits.float()
        weight = None if weights is None else weights.to(logits.device)
        hard = F.cross_entropy(logits, labels[:, 0].long(), weight=weight, label_smoothing=label_smoothing)
        if labels.shape[1] == 1:
            return hard
        student = F.log_softmax(logits / temperature, -1)
        teacher = F.log_softmax(labels[:, 1:].float() / temperature, -1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return (1 - teacher_share) * hard + teacher_share * temperature**2 * kl

    return loss
