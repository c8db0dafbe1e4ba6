#!/usr/bin/env bash
# Every route of a server by its own document, for a bounded time: no 500, no undocumented status or type of content.
# schemathesis_client.sh URL [SECONDS]; needs schemathesis.
set -eu
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
schemathesis run "$1/openapi.json" --url "$1" --checks $checks -n 25 --max-time "${2:-60}" --request-timeout 30 \
  --generation-database none -w 1 --seed 1 --no-color
