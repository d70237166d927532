"""``mpdit coordcheck``: is what the network computes, and what an update changes, the same at every width?"""
