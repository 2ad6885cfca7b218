#!/usr/bin/env bash
# Put the whole line into the queue: shards, then pretraining on them, then the Hugging Face folder, fine-tuning and the score.
# Each waits until the one before is complete; a job that requeues itself keeps its number, so the ones behind it go on waiting.
#
#   CORPUS='/data/corpus/*.jsonl.zst' TOKENIZER=/data/tok SHARDS=/data/shards PRETRAIN=configs/bert-base.yaml RUN=runs/bert-base \
#       EXPORT=hf/bert-base FINETUNE=configs/finetune/sst2.yaml slurm/pipeline.sh
#
# Run it on a login node. A stage whose variable is not set is left out. Options for every job: SBATCH_ACCOUNT, SBATCH_PARTITION
# and the other variables that sbatch reads; for one stage: PRETRAIN_OPTIONS='--nodes=8 --time=12:00:00', and so SHARDS_OPTIONS,
# EXPORT_OPTIONS, FINETUNE_OPTIONS, EVALUATE_OPTIONS, words parted by blanks. A stage that ends badly leaves the ones behind it
# waiting, for `DependencyNeverSatisfied`: cancel them, mend, and start this again; what is complete ends at once.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
before=() # the dependency on the stage before

submit() { # submit STAGE SCRIPT ARGUMENT...: prints, and remembers for the next stage
    local stage=$1 named=${1^^}_OPTIONS job options
    shift
    read -ra options <<<"${!named:-}"
    job=$(sbatch --parsable --job-name="$stage" "${before[@]}" "${options[@]}" "$@")
    job=${job%%;*} # a multi-cluster answer has the cluster's name behind it
    before=(--dependency="afterok:$job")
    echo "$stage: job $job"
}

if [[ -n ${CORPUS:-} ]]; then
    submit shards "$here/build_shards.sbatch" --input "$CORPUS" --tokenizer "${TOKENIZER:?}" --out "${SHARDS:?}"
fi
if [[ -n ${PRETRAIN:-} ]]; then
    submit pretrain "$here/pretrain.sbatch" "$PRETRAIN" "run_folder=${RUN:?}" ${SHARDS:+"data.path=$SHARDS"}
fi
if [[ -n ${EXPORT:-} ]]; then
    submit export "$here/export.sbatch" "${RUN:?}" --out "$EXPORT" --overwrite
fi
if [[ -n ${FINETUNE:-} ]]; then
    submit finetune "$here/finetune.sbatch" "$FINETUNE" "model.init_from=${RUN:?}"
fi
if [[ -n ${RUN:-} ]]; then
    submit evaluate "$here/evaluate.sbatch" "$RUN"
fi
