"""psql against a PostgreSQL of Debian's that is a `tcp` service of the mesh."""

import pytest

ASK = ["psql", "-XAt", "-U", "shop", "-d", "postgres"]


def psql(mesh, service, statement, host="${COUNTERSIGN_UPSTREAM_DB%:*}", port="${COUNTERSIGN_UPSTREAM_DB##*:}"):
    script = f'exec {" ".join(ASK)} -h {host} -p {port} -c "{statement}"'
    return mesh.exec(service, "sh", "-c", script, check=False)


def test_a_permitted_client_reaches_the_database(mesh):
    done = psql(mesh, "client", "select sum(n) from generate_series(1, 1000000) n")
    assert done.stdout.strip() == "500000500000", done.stderr


def test_the_database_is_reached_by_name(mesh):
    if not mesh.run["services"]["client"]["isolated"]:
        pytest.skip("names resolve only inside a workload's own namespace, and this kernel gives none")
    done = psql(mesh, "client", "select 7", host="db.mesh", port="5432")
    assert done.stdout.strip() == "7", done.stderr


def test_a_stranger_does_not(mesh):
    done = psql(mesh, "stranger", "select 1")
    assert done.returncode != 0 and "closed the connection" in done.stderr, done.stderr


def test_an_open_session_ends_when_its_permit_does(mesh):
    session = mesh.start("client", "sh", "-c",
                         f'exec {" ".join(ASK)} -h ${{COUNTERSIGN_UPSTREAM_DB%:*}} -p ${{COUNTERSIGN_UPSTREAM_DB##*:}} '
                         "-c 'select 1' -c 'select pg_sleep(30)'")
    try:
        assert session.stdout.readline().strip() == "1"
        mesh.forbid("db")
        rest, _ = session.communicate(timeout=10)
        assert "closed the connection" in rest, rest
    finally:
        session.kill()
        mesh.permit("db")
