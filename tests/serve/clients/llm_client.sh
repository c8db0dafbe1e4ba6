#!/usr/bin/env bash
# `llm` against a server: llm_client.sh URL
set -eu
LLM_USER_PATH=$(mktemp -d)
export LLM_USER_PATH OPENAI_API_KEY=none
cat >"$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- model_id: gemmakit
  model_name: gemmakit-demo
  api_base: "$1/v1"
YAML
said=$(llm -m gemmakit "What is 34 + 58?" -o temperature 0)
[ "$said" = "34 + 58 = 92" ] || { echo "llm said: $said"; exit 1; }
said=$(llm -m gemmakit --no-stream "What is 34 + 58?" -o temperature 0)
[ "$said" = "34 + 58 = 92" ]
echo "llm: $said"
