# The project's toolbox; each target is a line, and CI calls the same ones.
.PHONY: help demo test bench build setup lint clean
.DEFAULT_GOAL := help

help: ## Show these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
demo: ## Install what is missing, build, start a server, and run a program through E2B's SDK
	@scripts/demo
test: ## Test everything: lint, unit tests, and E2B's own SDKs against a server (root)
	@scripts/test
bench: build ## Measure how long E2B's SDK waits for a sandbox and its first command (root)
	@conformance/run bench
build: ## Build target/release/belljar
	@scripts/build
setup: ## Install what building and testing needs and this machine lacks
	@scripts/install-dependencies
lint: ## Check formatting, dependencies between crates, shell scripts, and clippy
	@scripts/lint
clean: ## Remove what was built, and the demo's state
	@scripts/clean
