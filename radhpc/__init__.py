"""What runs inside the job: recipe, stream, models, engine, loop, checkpoint, evaluate.

Imports neither slurm nor shards.
"""
