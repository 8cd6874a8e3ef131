"""Building blocks as plain modules: experts, gates, one level of CGC or HoME, feature encoders, towers."""
