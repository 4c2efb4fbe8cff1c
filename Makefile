# `make test` installs what the tests need and runs everything; the other targets are its parts.
.PHONY: test tools fmt lint deny unit foreign docs fuzz-short bench up-smoke

test: tools fmt lint deny unit foreign fuzz-short
	@echo "everything passed"

tools:
	scripts/test-tools

fmt:
	cargo fmt --all --check

lint:
	cargo clippy --workspace --all-targets --locked -- -D warnings

deny:
	scripts/deny

# Unit, property, in-process and end-to-end tests, and the documents that tests write.
unit:
	cargo build --workspace --locked
	scripts/rust-tests

# The real binary against programs we did not write: curl, openssl, psql, grpcio, websockets, h2load.
foreign:
	cargo build --release --locked
	scripts/foreign-tests

# Rewrites the documents that tests compare (docs/cli.md and its like). Read the difference before committing it.
docs:
	UPDATE_DOCS=1 cargo test --workspace --locked documents

fuzz-short:
	scripts/fuzz-short

bench:
	scripts/bench
