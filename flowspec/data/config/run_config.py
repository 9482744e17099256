# What run_pipe.sh, run_pipe_eval.sh and run_eval.sh run; their options win over this file.
# The file is read, never executed: plain assignments alone, with the values written out.

# model and paths
base_model_dir = "models/demo/target"  # HF id, or folder of a model or of a split model
EAGLE_model_path = ""  # folder of its draft head; the bundled model has its own
num_stage = None  # processes, the head among them; None: as the model is split, else 5

# method: ar, serial, naive, pruned, pipedec, continuous (FlowSpec) or streaming
pipeline_type = "streaming"  # of run_pipe.sh
pipeline_types = ["ar", "continuous", "streaming"]  # of run_pipe_eval.sh

quant = False
device = "cpu"  # of run_pipe.sh: cpu or cuda

# sampling and lengths
temperature = 0.0  # of run_pipe.sh
temperatures = [0.0]  # of the evaluation
max_new_tokens = 200

# what is asked: a message; in the evaluation files or sets (mt_bench, humaneval, gsm8k, alpaca, sum
# and qa, from --data-dir or the hub), from question_begin to the one before question_end
your_message = ""
dataset_names = ["models/demo/prompts.jsonl"]
question_begin = None
question_end = None
