#!/usr/bin/env bash
# Creates the cluster in Kubernetes, once. Certificates and tokens are made on this machine and passed as Secrets; the founding Secret is
# deleted as soon as every node has unpacked it. Needs kubectl and aviary on this machine.
#   deploy/kubernetes/found.sh DIR      writes the certificate authority and the admin's token to DIR; keep DIR off the cluster
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
keep=${1:?"expected a directory for the certificate authority and the token: deploy/kubernetes/found.sh DIR"}
namespace=aviary
nodes=(aviary-0 aviary-1 aviary-2)
fail() { echo "found.sh: $*" >&2; exit 1; }
for program in kubectl aviary tar; do command -v "$program" >/dev/null || fail "$program is missing"; done
if kubectl -n "$namespace" get statefulset aviary >/dev/null 2>&1; then fail "a cluster is there already, expected none in namespace $namespace"; fi
[ ! -e "$keep/ca" ] || fail "$keep/ca is there already, expected a directory without one"
mkdir -p "$keep"
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
configs=()
for node in "${nodes[@]}"; do configs+=(--config "$here/config/$node.toml"); done
aviary cluster init "${configs[@]}" --data-root "$made" --ca "$keep/ca"
aviary token --role admin --name admin >"$made/token"
sed -n 's/^token: *//p' "$made/token" >"$keep/token"
chmod 600 "$keep/token"
sed -n 's/^line: *//p' "$made/token" >"$made/tokens"
files=()
for node in "${nodes[@]}"; do
  tar -C "$made" -cf "$made/$node.tar" "$node"
  files+=(--from-file "$made/$node.tar")
done
kubectl apply -f "$here/namespace.yaml"
kubectl -n "$namespace" create secret generic aviary-tokens --from-file "$made/tokens"
kubectl -n "$namespace" create secret generic aviary-founding "${files[@]}"
kubectl apply -k "$here"
kubectl -n "$namespace" rollout status statefulset/aviary --timeout 300s
kubectl -n "$namespace" delete secret aviary-founding
echo "founded; next: kubectl -n $namespace port-forward pod/aviary-0 50051, AVIARY_TOKEN=\$(cat $keep/token) aviary list"
