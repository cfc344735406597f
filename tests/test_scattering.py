"""The packaged tables of scattering factors, against physics that needs no table."""

import jax.numpy as jnp
import numpy as np
import pytest
from ase.data import chemical_symbols

from depthprob.errors import InputError
from depthprob.physics.scattering import parameters, scattering_factor

ELEMENTS = chemical_symbols[1:104]
BOHR_RADIUS = 0.529177211  # Å


def test_every_lobato_row_has_the_charge_of_its_nucleus():
    # Lobato and Van Dyck's fits obey f_e -> Z / (2 pi^2 a0 q^2) exactly: sum a / b is that coefficient
    for number, element in enumerate(ELEMENTS, start=1):
        a, b = parameters(element, "lobato")
        assert (a / b).sum() == pytest.approx(number / (2 * np.pi**2 * BOHR_RADIUS), rel=1e-7)


def test_the_two_tables_agree_for_every_element():
    q = np.linspace(0.3, 6, 60)
    for element in ELEMENTS:
        lobato, kirkland = (
            np.asarray(scattering_factor(element, q, p)) for p in ("lobato", "kirkland")
        )
        assert (
            np.abs(lobato / kirkland - 1).max() < 0.05
        )  # independent fits to the same atoms; measured 0.043 (Ir)


def test_gold_scatters_forward_by_about_ten_angstrom():
    # Doyle and Turner (1968) and Kirkland (2010) print 10.57 and 10.8 Å for f_e(0) of gold
    assert float(scattering_factor("Au", jnp.asarray(0.0))) == pytest.approx(10.6, abs=0.4)


@pytest.mark.parametrize("parametrization", ["peng", "Lobato"])
def test_unknown_table_is_named(parametrization):
    with pytest.raises(InputError, match="'lobato' or 'kirkland'"):
        scattering_factor("Au", jnp.asarray(1.0), parametrization)
