"""Tell where runs stand and why: status, goodput, logs, pending reasons, tables and live views."""
