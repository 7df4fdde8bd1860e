"""Settings for Django's own tests: the server is the one that PGPORT names."""

import os


def _database(name):
    return {"ENGINE": "django.db.backends.postgresql", "NAME": name, "USER": "postgres", "PASSWORD": os.environ["PGPASSWORD"],
            "HOST": "127.0.0.1", "PORT": os.environ["PGPORT"]}


DATABASES = {"default": _database("django"), "other": _database("django_other")}
SECRET_KEY = "of no use"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
TEST_RUNNER = "django_runner.Runner"
