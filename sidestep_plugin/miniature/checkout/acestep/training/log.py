"""`logger`: loguru's if it is installed, else the standard library's. (ACE-Step requires loguru.)"""

try:
    from loguru import logger
except ImportError:
    import logging

    logger = logging.getLogger("acestep")
