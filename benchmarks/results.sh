#!/usr/bin/env bash
# The runs behind the README and docs/: bash benchmarks/results.sh [micro|base|demo|tasks|techniques|shakespeare|objectives|reward|char|speed|learn|roofline|
# scaling|cnn|exact|vit|clip|c2i|vlm|overopt]
# Tiny Shakespeare is taken from NANOGRPO_DATA or downloaded. One thread a process: two seeds side by side on two cores.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-.venv/bin/python}"
steps="${STEPS:-70}"
what="${1:-all}"

want() { [ "$what" = all ] || [ "$what" = "$1" ]; }

if want micro; then  # what five seeds of the first file print
  mkdir -p results/micro
  for seed in 0 1 2 3 4; do
    $python micro_grpo.py $seed > results/micro/s$seed.txt
  done
fi
if want base; then  # π₀ and the reward model that all RL runs share
  $python sft.py --overwrite --data shakespeare --steps 900 --out out/sft --log results/sft.csv
  $python reward_model.py --overwrite --data shakespeare --judge sentiment --log results/reward-s0.csv
fi
if want demo; then  # the README's figure: as long as `make demo` trains
  for seed in 0 1 2; do
    for name in grpo ppo; do
      $python train_$name.py --overwrite --data shakespeare --gold sentiment --steps 25 --seed $seed \
        --log results/demo/$name-s$seed.csv --out out/r-demo-$name-s$seed
    done
  done
fi
if want tasks; then  # a weak π₀ a task, then GRPO and PPO from it with equal samples; settings from trials on seed 10
  rl="--max_new 8 --prompts_per_step 16 --beta 0 --eval_every 50 --eval_prompts 256 --samples 0"
  for task in add sort; do
    [ $task = add ] && sft_steps=600 || sft_steps=120
    weak=out/r-sft-$task
    [ -f $weak/state.pth ] || $python sft.py --data task:$task --tokenizer char --block_size 24 --steps $sft_steps \
      --seed 10 --log results/tasks/sft-$task.csv --out $weak
    for seed in ${SEEDS:-0 1 2 3 4}; do
      for name in grpo ppo; do
        [ $name-$task = ppo-sort ] && lr=2e-4 || lr=1e-4
        $python train_$name.py --overwrite --policy $weak/policy.pth --task $task $rl --lr $lr --minibatches 4 \
          --steps "${STEPS:-201}" --seed "$seed" --log results/tasks/$name-$task-s"$seed".csv \
          --out out/r-$name-$task-s"$seed"
      done
    done
    $python plot.py --metric eval_acc,eval_pass8 --x samples --output results/tasks/$task.png \
      results/tasks/grpo-$task-s?.csv results/tasks/ppo-$task-s?.csv
  done
fi
if want techniques; then  # one technique at a time, from the π₀ of `tasks`; on a GPT, so without LoRA
  $python benchmarks/techniques_table.py
fi
if want shakespeare; then
  for name in grpo ppo; do
    for seed in 0 1 2; do
      $python train_$name.py --overwrite --data shakespeare --gold sentiment --steps "$steps" --seed $seed \
        --log results/shakespeare/$name-s$seed.csv --out out/r-$name-s$seed
    done &
  done
  wait
fi
if want objectives; then
  for name in reinforce rloo grpo dr_grpo dapo gspo cispo sapo; do
    $python train_grpo.py --overwrite --data shakespeare --gold sentiment --objective $name --beta 0.05 \
      --steps 30 --log results/objectives/$name.csv --out out/r-$name
  done
fi
if want reward; then
  for seed in 1 2; do
    $python reward_model.py --overwrite --data shakespeare --judge sentiment --seed $seed \
      --log results/reward-s$seed.csv --out out/r-reward-s$seed
  done
  for seed in 0 1 2; do
    $python reward_model.py --overwrite --data shakespeare --judge sentiment --n_pairs 12288 --seed $seed \
      --log results/reward12k-s$seed.csv --out out/r-reward12k-s$seed
  done
fi
if want overopt; then  # score and gold against KL: RL and best-of-n, on the play, answers of at most 20 tokens
  folder=results/overoptimisation
  short="--data play --policy out/r-overopt-sft/policy.pth --prompt_len 8 --max_new 20"
  rl="--prompts_per_step 8 --eval_every 1000 --save_every 1000"
  $python sft.py --data play --steps 250 --dropout 0.1 --muon_lr 0.02 --lr_end 0 --eval_every 50 --log $folder/sft.csv --out out/r-overopt-sft
  for seed in ${SEEDS:-0 1 2}; do
    for pairs in 1024 4096 12288; do
      run=$pairs-s$seed
      $python reward_model.py $short --n_pairs $pairs --held_out_pairs 512 --eval_every 1000 --seed "$seed" \
        --log $folder/reward-"$run".csv --out out/r-overopt-reward-"$run"
      for name in grpo ppo; do
        [ $name = grpo ] && how="--lr 2e-4 --steps 70" || how="--lr 1e-4 --steps 50"  # from trials on seed 10
        $python train_$name.py $short $rl $how --reward_model out/r-overopt-reward-"$run"/reward.pth --seed "$seed" \
          --log $folder/$name-"$run".csv --out out/r-overopt-$name-"$run"
      done
    done
    $python benchmarks/best_of_n.py $short --n_prompts 16 --seed "$seed" \
      --reward_model out/r-overopt-reward-{1024,4096,12288}-s"$seed"/reward.pth \
      --log $folder/best_of_n-{1024,4096,12288}-s"$seed".csv
  done
  $python benchmarks/overoptimisation.py
fi
if want char; then
  $python sft.py --overwrite --preset char --data shakespeare --log results/char.csv --out out/r-char
fi
if want speed; then
  long="--prompt_len 192 --group_size 16 --prompts_per_step 4"
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py --out results/vs_trl.csv
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py $long --out results/vs_trl_long.csv
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py --compile --rounds 1 --out results/vs_trl_compiled.csv
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py $long --compile --rounds 1 --out results/vs_trl_long_compiled.csv
fi
if want learn; then  # from base's π₀: 8 seeds of each engine and objective, two runs side by side; dapo once more
  learn="$python benchmarks/vs_trl.py --learn --data shakespeare --jobs 2 --seeds 8"
  $learn --out results/learn
  $learn --objectives dapo --seed 8 --out results/learn_dapo
fi
if want roofline; then  # this one and the next want a machine with nothing else to do
  OMP_NUM_THREADS=2 $python benchmarks/roofline.py --compile --out results/roofline.csv
fi
if want scaling; then
  OMP_NUM_THREADS=2 $python benchmarks/scaling.py --out results/scaling.csv
  OMP_NUM_THREADS=2 $python benchmarks/scaling.py --memory --out results/scaling.csv
fi

rl="--aux_ce_coef 0 --temperature 1.5 --steps 1500"  # reward alone; the default adds 0.1 × cross-entropy
cnn() { name=$1; seeds=$2; shift 2
  for seed in $(seq 0 "$seeds"); do
    $python -m vision.cnn_grpo --overwrite "$@" --seed "$seed" --log results/cnn/$name-s$seed.csv --out out/r-cnn-$name-s$seed \
      > /dev/null
  done; }
if want cnn; then
  for reward in bandit smooth margin topk; do cnn $reward 4 $rl --reward $reward; done &
  cnn ce 4 $rl --method ce
  cnn head_only 2 $rl --head_only
  cnn head_first 2 $rl --head_only --steps 500  # then the whole network from there
  for seed in 0 1 2; do
    cnn_from="--sft_images 0 --weights out/r-cnn-head_first-s$seed/best_small_grpo.pt"
    $python -m vision.cnn_grpo --overwrite $rl --steps 1000 $cnn_from --seed $seed \
      --log results/cnn/head_then_all-s$seed.csv --out out/r-cnn-then-s$seed > /dev/null
  done
  for K in 2 16; do cnn K$K 2 $rl --group_size $K; done
  for kl in 0 0.2 1; do cnn kl$kl 2 $rl --beta $kl; done
  cnn defaults 4
  wait
  rm -f results/cnn/*.png
  for file in results/cnn/*.csv; do  # 1,500 rows a run are 10 MB in all: every 25th stays, where evaluations are
    awk -F, 'NR == 1 || $1 % 25 == 0' "$file" > "$file.thin" && mv "$file.thin" "$file"
  done
fi
if want exact; then
  $python benchmarks/exact.py
fi
if want vit; then
  for task in class box mask; do
    for seed in 0 1 2 3 4; do
      $python -m vision.vit_grpo --overwrite --task $task --seed $seed --log results/vit/$task-s$seed.csv \
        --out out/r-vit-$task-s$seed > /dev/null
    done
  done
fi

clip() { name=$1; seeds=$2; shift 2
  for seed in $(seq 0 "$seeds"); do
    $python clip_grpo.py --overwrite "$@" --seed "$seed" --log results/clip/$name-s$seed.csv --out out/clip/r-$name > /dev/null
  done; }
if want clip; then
  clip reward01 4
  clip smooth 4 --reward smooth
  clip lora 4 --use-lora --lora-r 8
  clip ce 4 --method ce
  clip weak01 2 --start-accuracy 0.15
  clip weaksmooth 2 --start-accuracy 0.15 --reward smooth
  rm -f results/clip/*.png
fi
if want c2i; then
  for seed in 0 1 2; do
    models="--ckpt-dir out/r-c2i --global-seed $seed"  # what is trained before GRPO is kept there
    $python -m vision.c2i_grpo $models --log results/c2i/grpo-s$seed.csv > /dev/null
    $python -m vision.c2i_grpo $models --beta 0 --log results/c2i/beta0-s$seed.csv > /dev/null
    $python -m vision.c2i_grpo $models --sampling teacher-forced --log results/c2i/mse-s$seed.csv > /dev/null
  done
fi
if want vlm; then
  for engine in trl nano; do
    for seed in 0 1 2; do
      $python -m vision.vlm_grpo --engine $engine --seed "$seed" --log results/vlm/$engine-s$seed.csv \
        --output_dir out/r-vlm-$engine-s$seed
    done &
  done
  wait
fi
