"""A model reads a text longer than its window, sleeps after each window, and is asked about it afterwards.

    python examples/sleep_and_ask.py

The weights are random, so the answers mean nothing: the program shows what a session keeps, and that it stays small.
"""

import torch

from sleepkern.nn import SleepLM
from sleepkern.sleep import SleepSession

torch.manual_seed(0)
model = SleepLM(vocabulary=256, width=128, heads=4, blocks=4, window=128).eval()
torch.nn.init.normal_(model.lm_head.weight)  # a fresh head is 0, so that training starts from equal chances
text = torch.tensor([list((b"The cat sat on the mat. " * 200)[:2100])])

session = SleepSession(model, window=128, passes=4)
print(session.explain())

for start in range(0, text.shape[1], 700):  # the text may come in pieces of any length
    session.ingest(text[:, start : start + 700])
    size = sum(t.numel() * t.element_size() for t in session.state_dict().values() if isinstance(t, torch.Tensor))
    print(f"{session.position:5d} tokens slept over, {session.pending.shape[1]:3d} pending, {size / 1e3:.0f} kB kept")

for report in session.reports[-2:]:
    changes = ", ".join(f"{float(change):.2f}" for change in report.changes)
    print(f"the sleep at {report.first}: each pass changed the fast weights by {changes} of their size")

question = torch.tensor([list(b"Where did the cat sit?")])
answer = session.generate(question, max_new_tokens=8)
print("answered:", answer[0, question.shape[1] :].tolist())
assert torch.equal(session.generate(question, max_new_tokens=8), answer), "generate has changed the session"

other = session.fork()  # goes on alone: two readers of the same past
other.ingest(torch.tensor([list(b"Then the dog came in." * 10)]))
assert other.position > session.position

kept = session.state_dict()  # tensors that safetensors can hold
later = SleepSession(model, window=128, passes=4)
later.load_state_dict(kept)
assert torch.equal(later.generate(question, max_new_tokens=8), answer), "the saved session answers something else"
