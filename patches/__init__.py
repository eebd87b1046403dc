"""The minimal diff that makes an ACE-Step checkout load plugins by itself; see README.md here."""
