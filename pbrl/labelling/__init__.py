"""People as teachers: the store of questions and answers, the page on which they are answered, and its server.

    training ── HumanTeacher ──► labelling.sqlite3 ◄── server ◄── page (browser)
                                                         └── drawing (clips, a process of its own)

The store is the one truth: questions are in it before anybody is asked, each answer is on the disk before the page
hears that it was given. Training, server and drawing are three processes; killing any of them loses nothing.
"""
