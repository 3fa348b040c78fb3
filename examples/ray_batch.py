"""Score, embed and continue texts on a cluster's cores or GPUs: pip install 'ray[data]'; python examples/ray_batch.py"""

import ray

from gptneo_fast.demo import FOLDER
from gptneo_fast.integrations.ray import Embedder, Generator, Scorer, share

ray.init(num_cpus=4, log_to_driver=False)
model = share(FOLDER)  # once in the store of each node; a hub id loads it here
texts = ray.data.from_items([{"text": f"Once upon a time there was a {a}"} for a in ("fox", "dog", "king", "girl")])

actors = {"compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 1}  # on GPUs: size=8 and "num_gpus": 1
rows = (
    texts.map_batches(Scorer, fn_constructor_args=(model,), batch_size=2, **actors)
    .map_batches(Embedder, fn_constructor_args=(model,), batch_size=2, **actors)
    .map_batches(
        Generator,
        fn_constructor_args=(model,),
        fn_constructor_kwargs={"max_new_tokens": 12, "do_sample": True},
        batch_size=2,
        **actors,
    )
)
for row in rows.take_all():
    print(f"{row['total']:8.2f}  {len(row['embedding'])} numbers  {row['text']}{row['generated']}")
