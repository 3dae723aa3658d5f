"""First words of texts of many kinds, written for this project: the model itself goes on with them.

Text that a model samples from a random token is mostly English prose and code. But what a conversion never
sees, it rounds badly, so calibration must also see other languages, dialogue, tables and markup.
"""

from __future__ import annotations

OPENINGS = (
    # English prose.
    "Once upon a time, in a small village by the sea,",
    "The history of the city begins in the",
    "In recent years, scientists have discovered that",
    "Chapter 1\n\nIt was raining when",
    "The company announced on Tuesday that",
    "My grandmother always used to say that",
    "The main difference between plants and animals is",
    "LONDON - The prime minister said",
    "To bake bread at home, you need",
    "The theory of relativity states that",
    # Dialogue, questions and letters.
    '"Where have you been?" she asked.\n\n"',
    "Q: What is the capital of Italy?\nA:",
    "Customer: Hello, I have a problem with my order.\nAgent:",
    "Interviewer: How did you start your career?\n",
    "Dear Mr. Smith,\n\nThank you for your letter of",
    "ROMEO: ",
    "- How are you?\n- I'm fine, thanks. And you?\n-",
    "Question: Why is the sky blue?\nAnswer:",
    # Lists, tables and numbers.
    "Shopping list:\n- 2 kg of potatoes\n-",
    "| Country | Capital | Population |\n|---|---|---|\n|",
    "Year,Sales,Profit\n2015,",
    "1. Introduction\n2. ",
    "Monday: 9:00 - 17:00\nTuesday:",
    "Name\tAge\tCity\nAnna\t34\t",
    "Solve the equation 3x + 5 = 20.\n\nSolution:",
    "12 + 7 = 19\n25 - 8 = 17\n",
    "The chemical elements and their symbols: hydrogen (H), helium (He),",
    "List of countries in Europe: Albania, Andorra,",
    # Code and markup.
    "import numpy as np\n\ndef ",
    "class Account:\n    def __init__(self,",
    "#include <stdio.h>\n\nint main(",
    "function getUser(id) {\n",
    "const express = require('express');\n",
    "SELECT name, price FROM products WHERE",
    "<!DOCTYPE html>\n<html>\n<head>",
    '{\n  "name": "example",\n  "version":',
    "#!/bin/bash\n\nset -e\n",
    "# Installation\n\nTo install the package, run\n\n```",
    "public class Main {\n    public static void",
    "\\begin{theorem}\nLet $f$ be",
    "package main\n\nimport (",
    "fn main() {\n    let",
    # Other languages.
    "Il était une fois une petite fille qui",
    "La France est un pays situé en",
    "Le lendemain matin, il se leva et",
    "Bonjour, je voudrais savoir si",
    "Es war einmal ein König, der",
    "Deutschland ist ein Land in",
    "Die Geschichte der Stadt beginnt",
    "Había una vez un hombre que",
    "España es un país de",
    "Buenos días, ¿cómo",
    "C'era una volta un",
    "L'Italia è una repubblica",
    "O Brasil é um país",
    "Era uma vez uma menina",
    "Er was eens een",
    "Polska jest krajem",
    "Россия - это",
    "中国是",
    "日本は",
    "Türkiye, Avrupa ve Asya'da",
    "Sverige är ett land i",
    "भारत एक",
)
