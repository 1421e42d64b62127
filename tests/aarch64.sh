#!/bin/sh
# Tests on an emulated aarch64 CPU: sh tests/aarch64.sh [pytest's arguments]. QEMU_CPU=neoverse-n1 is one without bf16
# instructions, max one with all that QEMU knows.
#
# For Debian on x86-64, after apt-get install qemu-user-static g++-aarch64-linux-gnu and make build. The compiler runs
# natively. Python and torch for aarch64 are unpacked into build/aarch64 (6 GB), not installed.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
kept=$PWD/build/aarch64
root=$kept/root
python=$kept/environment/bin/python

if [ ! -e "$kept/complete" ]; then
  rm -rf "$kept"
  mkdir -p "$kept/apt/lists/partial" "$kept/apt/archives/partial" "$kept/environment/bin" "$kept/sources" "$root/proc"
  touch "$kept/apt/status"
  cat > "$kept/apt/apt.conf" <<END
APT { Architecture "arm64"; Architectures { "arm64"; }; Install-Recommends "false"; };
Dir { State "$kept/apt"; State::status "$kept/apt/status"; Cache "$kept/apt"; };
END
  export APT_CONFIG="$kept/apt/apt.conf"
  apt-get -qq update
  apt-get -qq --yes --download-only install python3 libpython3-dev libstdc++6 libgomp1
  for package in "$kept"/apt/archives/*.deb; do dpkg -x "$package" "$root"; done
  version=$(basename "$root"/usr/lib/python3.*)

  # An environment whose interpreter is a script, so that child processes are emulated, too.
  echo "home = $root/usr/bin" > "$kept/environment/pyvenv.cfg"
  cat > "$python" <<END
#!/bin/sh
exec qemu-aarch64-static -L "$root" -0 "\$0" "$root/usr/bin/$version" "\$@"
END
  chmod +x "$python"
  grep -v '^triton' constraints.txt > "$kept/constraints.txt"
  python -m pip --disable-pip-version-check install -q -c "$kept/constraints.txt" --only-binary :all: \
    --implementation cp --python-version "${version#python}" --target "$kept/environment/lib/$version/site-packages" \
    $(seq -f '--platform=manylinux_2_%g_aarch64' 17 36) --platform=manylinux2014_aarch64 \
    torch numpy setuptools pybind11 pytest pytest-xdist hypothesis transformers peft safetensors

  # What torch looks for on such a machine; without these files it reads of an x86-64 one, and crashes.
  for cpu in $(seq 0 "$(($(nproc) - 1))"); do
    printf 'processor : %s\nCPU implementer : 0x41\nCPU architecture: 8\nCPU variant : 0x3\nCPU part : 0xd0c\n\n' "$cpu"
    mkdir -p "$root/sys/devices/system/cpu/cpu$cpu/regs/identification"
    echo 0x00000000413fd0c1 > "$root/sys/devices/system/cpu/cpu$cpu/regs/identification/midr_el1"
  done > "$root/proc/cpuinfo"
  touch "$kept/complete"
fi

git ls-files -z | tar c --null -T - | tar x -C "$kept/sources"
cd "$kept/sources"
export PYFASTPEFT_REQUIRE_NATIVE=1 PYFASTPEFT_CUDA=0
CXX=aarch64-linux-gnu-g++ CXXFLAGS="-idirafter $root/usr/include" "$python" setup.py -q build_ext --inplace
exec "$python" -m pytest -p no:cacheprovider "$@"
