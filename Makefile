# Two commands do everything on a fresh Debian 12 or Ubuntu 24.04 machine, as root: make demo, make test.

PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
# What boots other kernels: Debian 12's qemu for its libraries and its virtiofsd (later a package of its own).
VM_PACKAGES := qemu-system-x86 qemu-system-common busybox-static cpio zstd xz-utils ipvsadm
# What builds and runs the images, and makes them a base.
IMAGE_PACKAGES := podman runc mmdebstrap
# What makes the benchmark's traffic, and the peers that it is measured beside.
BENCH_PACKAGES := gcc libc6-dev bpfcc-tools bpftool conntrack
VERSION = $(shell sed -n 's/__version__ = "\(.*\)"/\1/p' tracer/version.py)
PACKAGES := python3-bpfcc python3-venv libbpf1 iproute2 iptables nftables conntrack procps kmod

# Tests that load no program.
BESIDE := tests/analysis tests/naming tests/store tests/fuzz $(patsubst %,tests/cli/test_%.py,lines name options report)

# A server that speaks Azure's protocol, for the tests of export; from npm, with Debian's node where there is none.
AZURITE := $(VENV)/azurite
AZURITE_VERSION := 3.35.0

.PHONY: setup azurite demo test scenarios test-slow fuzz endurance test-kernels test-kernels-short vm-packages lint format docs alerts \
	bench bench-parts bench-packages
.PHONY: image test-image image-packages

# A stamp, so that the packages are looked at once: remove .venv to do it again.
setup: $(VENV)/.ready
	@mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf

$(VENV)/.ready: pyproject.toml Makefile
	@[ "$$(id -u)" = 0 ] || { echo "eBPF and network namespaces need root: run 'sudo make'." >&2; exit 1; }
	@dpkg -s $(PACKAGES) >/dev/null 2>&1 || { apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(PACKAGES); }
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

azurite: $(AZURITE)/.ready-$(AZURITE_VERSION)

$(AZURITE)/.ready-$(AZURITE_VERSION): $(VENV)/.ready
	@command -v npm >/dev/null || { apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends nodejs npm; }
	@mkdir -p $(AZURITE)
	npm install --silent --no-audit --no-fund --no-save --prefix $(AZURITE) azurite@$(AZURITE_VERSION)
	@touch $@

demo: setup
	$(BIN)/vip-tracer demo

# What loads no program runs side by side; the rest, whose traffic is counted and timed, one after the other.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(BESIDE)
	$(BIN)/python -m pytest -q tests $(patsubst %,--ignore %,$(BESIDE) tests/scenarios tests/slow tests/vm tests/image)

# Every way a virtual IP is rewritten and a connection ends: real rules, real traffic, exact rows. Takes its time.
scenarios: setup
	$(BIN)/python -m pytest -q tests/scenarios

# An hour of coverage-guided fuzzing, or FUZZ_SECONDS; what it learns stays in build/fuzz.
fuzz: setup
	$(BIN)/python -m tests.fuzz

# 24 hours of rotation with an accelerated clock, and rounds of real connections: nothing grows. An hour or two.
endurance: setup
	$(BIN)/python -m tests.endurance.rotations
	$(BIN)/python -m tests.endurance.connections

# Faults at their full size: a hundred kills, a thousand namespaces, 100,000 open connections. Ten minutes.
test-slow: setup
	$(BIN)/python -m pytest -q -rP tests/slow

# The scenarios in guests with other kernels, emulated. What passed is kept in /var/cache/vip-tracer-kernels until what
# it depends on changes, so a run may be interrupted. The selection is for CI.
test-kernels: setup vm-packages
	$(BIN)/python -m tests.vm.matrix --page

test-kernels-short: setup vm-packages
	$(BIN)/python -m tests.vm.matrix --short --kernel bullseye-security --kernel trixie-backports

vm-packages:
	@dpkg -s $(VM_PACKAGES) >/dev/null 2>&1 || { apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(VM_PACKAGES); }

# The images, on Debian's slim one, which is pulled.
image: image-packages
	podman build -f deploy/Dockerfile --target node -t vip-tracer:$(VERSION) .
	podman build -f deploy/Dockerfile --target analysis -t vip-tracer-analysis:$(VERSION) .

# The same on a base made from Debian's archive, and run as the manifests say. Leaves no image behind.
test-image: setup image-packages
	$(BIN)/python -m pytest -q tests/image

image-packages:
	@dpkg -s $(IMAGE_PACKAGES) >/dev/null 2>&1 || { apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(IMAGE_PACKAGES); }

lint: setup
	$(BIN)/ruff check tracer tests
	$(BIN)/ruff format --check tracer tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror bpf/*.c bpf/*.h bpf/include/linux/*.h

format: setup
	$(BIN)/ruff check --fix tracer tests
	$(BIN)/ruff format tracer tests
	$(BIN)/clang-format -i bpf/*.c bpf/*.h bpf/include/linux/*.h

# The alert rules, checked and tried by Prometheus' own tool. Its package is unpacked, not installed: nothing starts.
alerts: $(VENV)/promtool
	$(VENV)/promtool check rules deploy/alerts/rules.yaml
	$(VENV)/promtool test rules deploy/alerts/rules_test.yaml

$(VENV)/promtool: $(VENV)/.ready
	@cd $(VENV) && { apt-get download -q prometheus 2>/dev/null || { apt-get update -q && apt-get download -q prometheus; }; }
	@dpkg-deb --fsys-tarfile $(VENV)/prometheus_*.deb | tar -xO ./usr/bin/promtool > $@.part
	@chmod +x $@.part && mv $@.part $@ && rm $(VENV)/prometheus_*.deb

docs: setup
	$(BIN)/vip-tracer schema -o markdown > docs/schema.md
	$(BIN)/vip-tracer schema --metrics -o markdown > docs/metrics.md
	{ echo '# Generated from rules.yaml (make docs); do not edit.'; \
	  echo 'apiVersion: monitoring.coreos.com/v1'; echo 'kind: PrometheusRule'; \
	  echo 'metadata: {name: vip-tracer, namespace: vip-tracer, labels: {app.kubernetes.io/name: vip-tracer}}'; \
	  echo 'spec:'; sed -n '/^groups:/,$$s/^/  /p' deploy/alerts/rules.yaml; } > deploy/alerts/prometheusrule.yaml

# An hour and a half on two cores; QUICK=1: ten minutes, and not worth more than that.
bench: setup bench-packages
	$(BIN)/python -m tests.bench.side_by_side $(if $(QUICK),--pairs 1 --seconds 0.5 --sustained 10 --rounds 1)

# Parts by themselves, and what only the tracer has.
bench-parts: setup bench-packages
	-$(BIN)/python -m tests.bench.captures
	$(BIN)/python -m tests.bench.ring_to_parquet
	$(BIN)/python -m tests.bench.node_process
	$(BIN)/python -m tests.bench.scale
	$(BIN)/python -m tests.bench.report --files 40
	$(BIN)/python -m tests.bench.storm
	$(BIN)/python -m tests.bench.compaction

bench-packages:
	@dpkg -s $(BENCH_PACKAGES) >/dev/null 2>&1 || { apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(BENCH_PACKAGES); }
