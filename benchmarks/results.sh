#!/usr/bin/env bash
# The runs behind the README and docs/: bash benchmarks/results.sh [micro|base|demo|tasks|techniques|gym|shakespeare|objectives|reward|char|
# speed|learn|roofline|scaling|gpu|cnn|lite0|exact|vit|clip|c2i|vlm|overopt]
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
  $python plot.py --metric mean_r,kl --output results/demo.png results/demo/*.csv
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
gym() { run=$1; sft_seed=$2; rl_steps=$3; longest=$4; task=gym:$5; shift 5  # the rest: flags of sft.py
  $python sft.py --data "task:$task" "$@" --batch_size 16 --seed "$sft_seed" --log results/gym/sft-"$run"-s"$sft_seed".csv \
    --out out/r-gym-sft-"$run"-s"$sft_seed"
  for seed in ${SEEDS:-0 1 2}; do
    $python train_grpo.py --policy out/r-gym-sft-"$run"-s"$sft_seed"/policy.pth --task "$task" --max_new "$longest" --beta 0 \
      --lr 1e-4 --minibatches 4 --steps "$rl_steps" --eval_every 25 --eval_prompts 128 --samples 0 --seed "$seed" \
      --log results/gym/"$run"-s"$seed".csv --out out/r-gym-"$run"-s"$seed"
  done; }
if want gym; then  # reasoning-gym: one π₀ a task, then GRPO; its settings are those of a trial on seed 10 of spell_backward
  legs=leg_counting:min_animals=1:max_animals=2:max_instances=3
  gym spell_backward 10 101 7 spell_backward:max_word_len=5 --vocab_size 300 --block_size 32 --steps 500 --eval_every 250
  gym leg_counting 0 76 4 $legs --vocab_size 440 --block_size 56 --steps 400 --eval_every 400 --muon_lr 0.02
  gym caesar_cipher 0 126 18 caesar_cipher:min_words=1:max_words=2 --vocab_size 320 --block_size 56 --steps 300 --eval_every 300 \
    --muon_lr 0.02
  SEEDS=0 gym leg_counting_weak 0 76 4 $legs --vocab_size 440 --block_size 56 --steps 300 --eval_every 300
  SEEDS=0 gym spell_backward_weak 0 76 7 spell_backward:max_word_len=5 --vocab_size 300 --block_size 32 --steps 350 --eval_every 350
  $python benchmarks/chance.py gym:spell_backward:max_word_len=5 gym:$legs gym:caesar_cipher:min_words=1:max_words=2 \
    gym:count_primes:max_n=100 gym:number_filtering:min_numbers=2:max_numbers=3:max_decimals=0:min_value=-9:max_value=9 \
    gym:number_sequence:max_terms=6:min_value=-20:max_value=20:max_complexity=2 gym:chain_sum:max_terms=2:max_digits=2 \
    gym:chain_sum:max_terms=3:max_digits=1 --out results/gym/chance.csv
  $python plot.py --metric eval_acc,eval_pass8 --output results/gym.png results/gym/{spell_backward,leg_counting,caesar_cipher}-s?.csv
fi
if want shakespeare; then
  for name in grpo ppo; do
    for seed in 0 1 2; do
      $python train_$name.py --overwrite --data shakespeare --gold sentiment --steps "$steps" --seed $seed \
        --log results/shakespeare/$name-s$seed.csv --out out/r-$name-s$seed
    done &
  done
  wait
  $python plot.py --grid --smooth 5 --output results/shakespeare.png results/shakespeare/*.csv
  $python plot.py --x kl --metric mean_r,gold,distinct,ref_logp --smooth 5 --output results/going_on.png results/shakespeare/*.csv
fi
if want objectives; then
  for name in reinforce rloo grpo dr_grpo dapo gspo cispo sapo; do
    $python train_grpo.py --overwrite --data shakespeare --gold sentiment --objective $name --beta 0.05 \
      --steps 30 --log results/objectives/$name.csv --out out/r-$name
  done
  $python plot.py --metric mean_r --smooth 5 --output results/objectives.png results/objectives/*.csv
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
  $python benchmarks/overoptimisation.py  # draws results/overoptimisation.png
fi
if want char; then
  $python sft.py --overwrite --preset char --data shakespeare --log results/char.csv --out out/r-char
fi
if want speed; then
  long="--prompt_len 192 --group_size 16 --prompts_per_step 4"
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py --out results/vs_trl.csv
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py $long --out results/vs_trl_long.csv
  OMP_NUM_THREADS=2 $python benchmarks/vs_trl.py --compile --rounds 1 --out results/vs_trl_compiled.csv
  $python benchmarks/gpu.py --only compile_nano --device cpu --out results/compile
fi
if want learn; then  # from base's π₀: 8 seeds of each engine and objective, two runs side by side; dapo once more
  learn="$python benchmarks/vs_trl.py --learn --data shakespeare --jobs 2 --seeds 8"
  $learn --out results/learn  # draws results/learn.png
  $learn --objectives dapo --seed 8 --out results/learn_dapo
fi
if want roofline; then  # this one and the next want a machine with nothing else to do
  OMP_NUM_THREADS=2 $python benchmarks/roofline.py --compile --out results/roofline.csv
fi
if want scaling; then
  OMP_NUM_THREADS=2 $python benchmarks/scaling.py --out results/scaling.csv  # draws results/scaling.png
  OMP_NUM_THREADS=2 $python benchmarks/scaling.py --memory --out results/scaling.csv
fi
if want gpu; then  # on one NVIDIA GPU, but for the demo's runs on a CPU
  $python benchmarks/gpu.py
  $python benchmarks/gpu.py --only demo --device cpu --jobs "${JOBS:-1}"
  $python plot.py --metric mean_r,kl --output results/gpu_demo.png results/gpu/demo/*.csv
  for seed in 0 1 2 3 4; do  # does it matter in which precision a CPU samples?
    for sampler in fp32 bf16; do
      $python train_grpo.py --data play --steps 25 --eval_every 5 --seed $seed --device cpu --samples 0 \
        --sample_dtype $sampler --log results/gpu/demo_sampler/$sampler-s$seed.csv --out out/r-$sampler-s$seed
    done
  done
fi

# Vision: a seed draws the three splits, a sweep chooses each seed's trial on validation, the table is the test's.
# About two hours of one core for all of them; JOBS=2 runs two side by side (c2i goes one by one).
sweep() { $python benchmarks/sweep_vision.py "$@"; }
jobs="--jobs ${JOBS:-1}"
plot="$python plot.py --output"
if want cnn; then
  sweep cnn $jobs
  $plot results/cnn.png --metric top1,eval_r results/cnn/{bandit,ce}-s?.csv
fi
lite0() { name=$1; shift
  $python -m vision.cnn_grpo --overwrite --model efficientnet-lite0 --img_size 48 --batch_size 16 --group_size 64 --sft_images 0 \
    --aux_ce_coef 0 --eval_every 1000 --eval_images 250 --seed "$seed" --log results/lite0/$name-s"$seed".csv \
    --out out/r-lite0-$name-s"$seed" "$@" > /dev/null; }
if want lite0; then  # published weights and random ones: the head, all weights, the head and then all; rates from seed 10
  $python benchmarks/photographs.py --log results/lite0/photographs.csv
  $python benchmarks/photographs.py --crops out/r-lite0-photographs
  for seed in ${SEEDS:-0 1 2}; do
    for data in mnist5k photographs; do
      [ $data = mnist5k ] && root=mnist5k steps=100 half=50 || root=out/r-lite0-photographs steps=30 half=15
      for start in published random; do
        [ $start = published ] && weights=default rate=1e-4 || weights=none rate=1e-4
        run=$start-$data
        lite0 all-"$run" --data_root $root --weights $weights --lr $rate --steps $steps
        lite0 head-"$run" --data_root $root --weights $weights --lr 1e-3 --steps $steps --head_only
        lite0 first-"$run" --data_root $root --weights $weights --lr 1e-3 --steps $half --head_only
        lite0 then-"$run" --data_root $root --weights out/r-lite0-first-"$run"-s"$seed"/best_efficientnet-lite0_grpo.pt \
          --lr $rate --steps $half
      done
    done
  done
  rm -f results/lite0/*.png
  $python benchmarks/head_first.py
  $python plot.py --metric mean_r --smooth 10 --output results/lite0.png \
    results/lite0/{all,head}-{published,random}-mnist5k-s?.csv
fi
if want exact; then
  $python benchmarks/exact.py  # also draws results/exact.png
  $plot results/exact_top1.png --metric top1,mean_r results/exact/{cross-entropy,exact_gradient,GRPO_G=16,GRPO_G=2}-s*.csv
fi
if want clip; then
  sweep clip $jobs
  sweep clip_weak $jobs
  $plot results/clip.png --metric top1,kl,entropy_norm results/clip/{reward01,smooth,lora,ce}-s?.csv
  $plot results/clip_weak.png --metric frac_zero_std,top1 results/clip/weak*-s?.csv
fi
if want c2i; then
  sweep c2i
  $plot results/c2i.png --metric mean_r,accuracy,diversity,frechet results/c2i/{grpo,beta0}-s?.csv
  cp results/c2i/grpo-s0.png results/c2i_images.png
fi
if want vit; then
  sweep vit $jobs
  cp results/vit/box-s0_images.png results/vit_box.png
  cp results/vit/mask-s0_images.png results/vit_mask.png
fi
if want vlm; then
  sweep vlm $jobs
  for seed in 0 1 2 3 4; do  # TRL's engine with the flags that the sweep chose for this seed: its curve should be the same
    lr=$(grep -o '"lr": [0-9.e-]*' results/vlm/nano-s$seed.json | head -1 | cut -d" " -f2)
    $python -m vision.vlm_grpo --engine trl --lr "$lr" --seed $seed --overwrite --log results/vlm/trl-s$seed.csv \
      --out out/r-vlm-trl-s$seed
  done
  $plot results/vlm.png --metric mean_r,accuracy,kl results/vlm/{nano,trl}-s?.csv
  cp results/vlm/nano-s0_images.png results/vlm_images.png
fi
rm -f results/{cnn,clip,c2i,vit,vlm}/*.png  # what is shown of them was copied above
